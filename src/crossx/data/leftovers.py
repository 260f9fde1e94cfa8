"""Files and folders that archives, cameras, editors, synchronisation and network drives leave among images."""

from __future__ import annotations

import fnmatch
import re

_GROUPS = {
    "archives, operating systems": """
        __macosx ._* .ds_store .appledouble .spotlight-v100 .fseventsd .temporaryitems .trashes .trash .trash-*
        desktop?db desktop?df network?trash?folder temporary?items thevolumesettingsfolder thumbs.db ehthumbs*.db
        desktop.ini folder.htt $recycle.bin recycler found.[0-9][0-9][0-9] system?volume?information config.msi
        $winreagent *:zone.identifier lost+found .directory .thumbnails .thumb thumbnails
        _thumbnails _thumbs""",
    "network drives, synchronisation": """
        @eadir @__thumb .@__thumb @recycle @recently-snapshot @tmp @sharebin @syno* *@synoeastream *@synoresource
        #recycle #snapshot .snapshot .nfs* .smbdelete* .fuse_hidden* .afpdeleted* .sync .stfolder .stversions
        .syncthing.* .dropbox* .tmp.drive* .~tmp~ onedrivetemp *.icloud
        *.sync-conflict-[0-9]* *conflicted?copy* *_conflict-[0-9]*""",
    "cameras, photo software": """
        .picasa* picasa.ini .nomedia _vti_cnf _vti_pvt _notes captureone *.lrdata *.cocatalog *.cosessiondb
        *.xmp *.aae *.thm *.pp3 *.dop *.cos *.cop *.lrv *.ctg *.mrk *.on1""",
    "editors, notebooks, trainings, downloads": """
        .ipynb_checkpoints lightning_logs mlruns wandb venv node_modules __pycache__
        .git .svn .hg .idea .vscode ~$* .~lock.* *~ #*# *.swp *.swo *.bak *.tmp *.temp
        *.part *.partial *.filepart *.crdownload *.download *.opdownload *.aria2 *.!ut *.!qb *.lnk *.url *.webloc""",
}
_SYSTEM = re.compile(
    "|".join(fnmatch.translate(pattern) for group in _GROUPS.values() for pattern in group.split())
    + r"|icon\r\Z"
)
_LISTED = re.compile(
    r"(^|[\\/])((__macosx|@eadir|#recycle|\$recycle\.bin|\.ipynb_checkpoints|\.thumbnails|\.appledouble)[\\/]|\._[^\\/]+$)"
    r"|(^|[\\/])(thumbs\.db|desktop\.ini|\.ds_store)$"
)


def is_system(name: str) -> bool:
    """Return whether a file or folder of this name is made by a program for itself, in any case."""
    return _SYSTEM.match(name.lower()) is not None


def is_leftover(name: str) -> bool:
    """Return whether a file or folder of this name is skipped: hidden (leading dot), or ``is_system``."""
    return name.startswith(".") or is_system(name)


def is_system_path(path: str) -> bool:
    """Return whether a path in a table is surely no image of the user: only what no one would list on purpose."""
    return _LISTED.search(path.lower()) is not None
