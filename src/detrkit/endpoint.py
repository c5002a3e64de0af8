"""What ``handler.py`` in a model's repository imports; see :mod:`detrkit.hub.endpoint`."""

from detrkit.hub.endpoint import EndpointHandler as EndpointHandler
