"""Connectors, which LLaVA calls projectors: each file is one."""
