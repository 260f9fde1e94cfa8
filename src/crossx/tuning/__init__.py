"""Search the options of a training on its validation images: the space, the search, its results."""
