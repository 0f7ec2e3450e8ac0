"""The evidence: at the top programs alone, then tasks, models and data, then common."""
