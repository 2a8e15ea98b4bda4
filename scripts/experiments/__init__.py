"""Run experiments on a small LLaVA that is made here: `demo`, `multitask`, `ratios`, `joint`, and what they share.

`combinations` stands alone: it tries all components on tiny random models.
"""
