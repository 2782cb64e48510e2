"""Make a small file of a checkpoint: the weights alone, in half precision, for detection.

python -m demo.slim trained_models/ssdlite_best.pth demo/ssdlite_shapes.pth
"""

from pathlib import Path

from src import usage
from src.checkpoint import load_checkpoint, save_checkpoint


def main():
    parser = usage.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="from train.py")
    parser.add_argument("output", help="file to write")
    args = parser.parse_args()
    usage.prepare_outputs([("output", args.output)], [args.checkpoint])
    state = load_checkpoint(args.checkpoint)
    slim = {key: state[key] for key in ("model", "classes", "category_ids")}
    weights = state["model_state_dict"].items()
    slim["model_state_dict"] = {
        name: values.half() if values.is_floating_point() else values for name, values in weights
    }
    save_checkpoint(Path(args.output), slim)


if __name__ == "__main__":
    usage.run(main)
