"""The Flower ClientApp, which an app folder names."""

import sys
from logging import WARNING

from flwr.clientapp import ClientApp
from flwr.common.logger import log

from slora_flwr.client.resident import handle

app = ClientApp()
app.query()(handle)
app.query("end")(handle)
app.query("introduce")(handle)
app.query("tell")(handle)
app.train()(handle)
app.evaluate()(handle)

# The process of Flower's simulation, which starts the workers next. Nowhere else is Ray
# needed.
if "flwr.server.superlink.fleet.vce" in sys.modules:
    try:
        from slora_flwr.engines import ray_pool

        ray_pool.install()
    except ImportError as error:
        log(WARNING, "A lost Ray worker will fail the run's messages: %s", error)
