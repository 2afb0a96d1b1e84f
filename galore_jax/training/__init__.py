"""The single-device training loop."""
