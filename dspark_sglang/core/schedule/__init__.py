"""Hardware-aware prefix scheduling: how many drafted tokens to verify, and which."""

from dspark_sglang.core.schedule.admission import admission_order, lengths
from dspark_sglang.core.schedule.budget import History, early_stop_budget, global_budget

__all__ = ["History", "admission_order", "early_stop_budget", "global_budget", "lengths"]
