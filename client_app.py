"""The Flower ClientApp."""

from flwr.clientapp import ClientApp

from slora_flwr.resident import handle

# Flower ClientApp
app = ClientApp()
app.query()(handle)
app.train()(handle)
app.evaluate()(handle)
