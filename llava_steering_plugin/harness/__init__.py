"""Give lmms-eval our models and the tasks that it lacks; nothing of lmms-eval is changed."""
