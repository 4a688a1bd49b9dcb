"""Federated LoRA as in Flower's examples: the model is loaded for every message."""

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from slora_flwr.common.random import key
from slora_flwr.config.schedule import make_schedule
from usual_server import load_data, make_model, read_recipe

# Flower ClientApp
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train this node's client."""
    config = read_recipe(context)
    model = make_model(config)
    arrays = message.content.array_records["arrays"]
    set_peft_model_state_dict(model, arrays.to_torch_state_dict())
    client = int(context.node_config["partition-id"])
    examples, _ = load_data(config).examples(client)
    [phase] = make_schedule(config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=phase.recipe.lr, weight_decay=0.0)
    # The batches of slora-flwr, so that both do the same work.
    server_round = message.content.config_records["config"]["server-round"]
    stream = np.random.Philox(key=key("train", config.seed, server_round, client))
    stream.random_raw()  # slora-flwr's seed of dropout
    model.train()
    bf16 = phase.recipe.precision == "bf16"
    losses = []
    for _ in range(phase.recipe.epochs):
        for rows in examples.shuffled(phase.recipe.batch_size, stream):
            ids, mask, labels = examples.batch(rows)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    content = RecordDict(
        {
            "arrays": ArrayRecord(get_peft_model_state_dict(model)),
            "metrics": MetricRecord(
                {
                    "num-examples": len(examples),
                    "loss": float(sum(losses) / len(losses)),
                }
            ),
        }
    )
    return Message(content, reply_to=message)
