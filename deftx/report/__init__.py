"""Results of many runs as one report: tables, plots, one page that a person sends to a co-author.

It reads what runs leave behind (``result.json``, ``predictions.parquet``, ``diagnostics.parquet``, ``sweep.json``) and
nothing else, so results that were copied from another machine do as well. ``collect`` finds and reads them,
``sections`` puts what may be compared side by side, ``summary`` computes means and paired bootstrap intervals,
``tables``, ``plots`` and ``page`` show them, ``publish`` writes the folder whole or not at all. Needs no torch; knows
nothing of Hydra.
"""
