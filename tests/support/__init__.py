"""What several tests share: real prompts, the independent reference, comparisons."""
