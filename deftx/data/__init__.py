"""Labelled tasks, unlabelled text and the synthetic language family, turned into common rows and batches."""
