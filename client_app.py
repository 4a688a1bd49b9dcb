"""The Flower ClientApp."""

from flwr.clientapp import ClientApp

from slora_flwr import node

# Flower ClientApp
app = ClientApp()
app.query()(node.query)
app.train()(node.train)
app.evaluate()(node.evaluate)
