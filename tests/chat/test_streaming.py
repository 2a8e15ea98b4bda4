"""An answer is streamed up to the stop text of its template."""

from __future__ import annotations

from tiny_llava import TinyLlava


def test_an_answer_ends_at_the_stop_text_of_its_template_where_the_model_goes_on(tiny: TinyLlava) -> None:
    import torch
    from transformers import AutoTokenizer

    from llava_steering_plugin.chat.streaming import AnswerStop, AnswerStreamer

    tokenizer = AutoTokenizer.from_pretrained(tiny.llm, use_fast=False)
    pieces: list[str] = []
    streamer = AnswerStreamer(tokenizer, "###", pieces.append)
    stop = AnswerStop(streamer)
    streamer.put(torch.empty(1, 0, dtype=torch.long))
    until = []
    for token in tokenizer("It is red.###Human: and what is this? ", add_special_tokens=False).input_ids:
        streamer.put(torch.tensor([token]))
        until.append(stop(torch.empty(1, 0), torch.empty(1, 0)))
    streamer.end()
    assert "".join(pieces) == streamer.text == "It is red."
    assert until[0] is False and until[-1] is True
    assert streamer.speed().tokens == len(until)
