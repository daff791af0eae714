"""The modules behind `finetune_vit.py`: one or two for each step, and a few that the steps share.

A module imports only modules that stand before it in this list: console, files, options, checks, settings,
workspace, archives, download, load, preprocess, duplicates, split, model, scores, checkpoints, finetune,
figures, report, evaluation, publish, use.
"""
