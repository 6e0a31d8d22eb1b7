"""Whole workflows that combine the folders below: training runs, evaluation, the doctor, chat, merging."""
