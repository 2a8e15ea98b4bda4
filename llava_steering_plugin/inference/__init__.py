"""Parts that chat, eval and the server share: the base model, images, questions and common options."""
