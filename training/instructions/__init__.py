"""Instruction data: made by rules, chosen from files, answered by a teacher."""
