"""Tune a model of transformers with MoReS, by TRL, on easy-VQA; then load the adapter and ask it.

python scripts/examples/trl_mores.py llava-hf/llava-1.5-7b-hf OUTPUT   # again: it resumes from OUTPUT
"""

import sys

import easy_vqa
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from llava_steering_plugin import SteeringTrainerMixin, from_pretrained, get_model

BASE, OUTPUT, STEPS = [*sys.argv[1:], 200][:3]


class SteeringTrainer(SteeringTrainerMixin, SFTTrainer):
    """Saves, resumes and checks the adapter."""


def sample(question: str, answer: str, image: str) -> dict:
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    given = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return {"images": [Image.open(image).convert("RGB")], "prompt": [asked], "completion": [given]}


questions, answers, numbers = easy_vqa.get_train_questions()
paths = easy_vqa.get_train_image_paths()
count = 8 * int(STEPS)
rows = zip(questions[:count], answers, numbers, strict=False)
data = Dataset.from_list([sample(question, answer, paths[number]) for question, answer, number in rows])

processor = AutoProcessor.from_pretrained(BASE)
model = get_model(AutoModelForImageTextToText.from_pretrained(BASE), "mores", rank=1)
settings = SFTConfig(OUTPUT, max_steps=int(STEPS), per_device_train_batch_size=8, learning_rate=1e-3, max_length=None,
                     use_cpu=not torch.cuda.is_available())  # fmt: skip
trainer = SteeringTrainer(model=model, args=settings, train_dataset=data, processing_class=processor)
trainer.train(resume_from_checkpoint=True)  # from the newest complete checkpoint, if there is one
trainer.save_model()

model, entry = from_pretrained(OUTPUT), data[0]
text = processor.apply_chat_template(entry["prompt"], add_generation_prompt=True)
inputs = processor(images=entry["images"], text=text, return_tensors="pt").to(model.device)
answer = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
answered = processor.decode(answer, skip_special_tokens=True)
sys.stdout.write(f"{entry['prompt'][0]['content'][1]['text']} {answered}\n")
