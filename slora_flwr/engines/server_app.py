"""The Flower ServerApp, which an app folder names."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import InMemoryGrid

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the run config says."""
    # Imported here, since it takes seconds: a simulation loads the ClientApp and starts
    # Ray only once this module is imported.
    from slora_flwr.server.run import run

    engine = "flwr" if isinstance(grid, InMemoryGrid) else "deployment"
    run(grid, context.run_config, context.run_id, engine=engine)
