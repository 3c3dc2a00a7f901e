"""Cached stages chained into a study: corpus, full phase, selection, sparse phase, composition, evaluation."""
