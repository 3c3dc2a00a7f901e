"""A sweep: many jobs of one command, of which only what is missing runs.

Every job has been validated before this begins. Each is planned against the stage cache (``plan``); a
run that was finished before, wherever it was launched, is copied from the cache into this sweep's folder. Stages which
several of the others need are made first, in waves, then the jobs run where the launcher puts them (``deftx.launch``).
What fails is named at the end and stops nothing else; ``sweep.json`` in the sweep's folder always says how far it got.
"""
