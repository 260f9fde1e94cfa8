"""Schemas of the JSON files of a run or a shared model, which may be of unknown origin. Imports no torch.

A valid file cannot make crossx open a path, download, import or run code, nor build a network of an unreasonable size:
``model.json`` describes an architecture, and the weights come from the file next to it.

``model`` has that of ``model.json``, ``run`` those of the other files, ``base`` what they share.
"""
