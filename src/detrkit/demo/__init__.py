"""The demo: a web page to drop images on (``detrkit demo``, and the folder ``spaces``).

``choices`` has the models and keeps a few of them loaded, ``results`` what is shown of an image at a
threshold, ``page`` the page itself and ``server`` what serves it. The last two need the extra ``demo``.
"""
