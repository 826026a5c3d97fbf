"""Topkapi on a Ray cluster: `serve run deploy/ray_serve.yaml` in a checkout, or that file's text in a RayService.

Settings are those of `topkapi serve`: variables (TOPKAPI_REPLICAS, TOPKAPI_MAX_REPLICAS, TOPKAPI_CHECKPOINTS, …) and
the file that TOPKAPI_CONFIG names. Every node needs Topkapi with the extra `ray`, the checkpoints and the file of
keys at the same paths. Whoever reaches Ray's own ports can run code: they belong into a network of their own.
"""

from topkapi.service.commands.launch import check_deployed, check_replicas
from topkapi.service.locations import all_at_hand, check_locations, default_checkpoints
from topkapi.service.replicas.ray_serve import application
from topkapi.service.settings import Settings

settings = Settings.read()
check_deployed(settings)
check_replicas(settings)
locations, settings = all_at_hand(default_checkpoints(settings), settings)
check_locations(locations, settings)
app = application(settings, [str(location) for location in locations])
