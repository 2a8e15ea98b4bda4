"""Run experiments on a small LLaVA that is made here: `demo` and `multitask`, and the parts that both use.

`combinations` stands alone: it tries all components on tiny random models.
"""
