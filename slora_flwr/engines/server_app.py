"""The Flower ServerApp, which an app folder names."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import InMemoryGrid

from slora_flwr.server.run import run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the run config says."""
    engine = "flwr" if isinstance(grid, InMemoryGrid) else "deployment"
    run(grid, context.run_config, context.run_id, engine=engine)
