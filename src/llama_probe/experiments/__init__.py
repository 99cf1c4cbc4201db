"""The paper's tables, and what serving with heads costs."""
