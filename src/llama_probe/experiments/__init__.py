"""Costs of serving with heads (`benchmark`), and the tables (`reproduction`) and figures (`paper`) of arXiv 2601.13288."""

__all__ = ["benchmark", "paper", "reproduction"]
