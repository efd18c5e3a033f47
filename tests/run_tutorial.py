"""Execute a tutorial and store it with its outputs.

    PYTHONPATH=tests python -m run_tutorial tutorials/sharing.ipynb

Its hub is the one of `fake_hub`; the notebook itself reads as with any other. Needs the extra `docs`.
"""

import os
import sys
import tempfile
from pathlib import Path

from fake_hub import serve


def surroundings(endpoint: str, folder: str | Path) -> dict[str, str]:
    """Environment of a tutorial: a hub on this machine, nothing of the user's, one thread."""
    hub = {
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": "hf_made_up",
        "HF_HOME": str(Path(folder) / "huggingface"),
        "HF_HUB_DISABLE_TELEMETRY": "1",  # else huggingface_hub asks its maker what runs it
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    ways = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    ways = dict.fromkeys([*ways, *map(str.lower, ways)], "http://127.0.0.1:9")  # no other host can be reached
    ways |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    # numba, which scanpy starts, sets the number of threads for torch, too
    threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return hub | ways | threads


def main(path: str) -> None:
    """Execute a notebook in an empty folder and write it back."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with serve() as hub, tempfile.TemporaryDirectory() as folder:
        os.environ.update(surroundings(hub.endpoint, folder))
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=1_500, resources=resources, record_timing=False).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    main(sys.argv[1])
