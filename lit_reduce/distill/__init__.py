"""Distillation: a reducer learns on top of a frozen backbone that serves as its teacher and carries its student."""
