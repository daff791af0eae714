"""The modules behind `finetune_vit.py`: one or two for each step, and a few that the steps share.

A module imports only modules that stand before it in this list: console, files, options, columns, checks,
settings, architectures, workspace, archives, hubdata, download, layouts, tables, rows, load, preprocess,
landmarks, copies, duplicates, earlier, split, model, scores, checkpoints, finetune, figures, report,
evaluation, publish, use.
"""
