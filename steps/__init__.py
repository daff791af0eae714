"""The modules behind `finetune_vit.py`: one or two for each step, and a few that the steps share.

A module imports only modules that stand before it in this list: console, files, options, columns, checks,
environment, settings, architectures, workspace, archive_formats, archives, hubdata, download, suspects,
layouts, tables, rows, image_formats, load, preprocess, landmarks, nearest, copies, duplicates, earlier,
split, model, attribution, intervals, counts, discrimination, scores, checkpoints, finetune, lettering,
curves, figures, galleries, report, evaluation, validation, label_issues, page, publish, paired, runs,
compare, use.
"""
