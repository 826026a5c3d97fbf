"""Instruction data made by code: questions whose answers a rule can check."""
