"""What vLLM and SGLang make of our outputs, by their own code, on a CPU.

    python -m tests.consumers                       everything: gigabytes of wheels once, then half an hour
    python -m tests.consumers demo-nvfp4 super      rows whose name has one of these words
    python -m tests.consumers --again               rows whose result is there too

An environment of its own gets vLLM's release for CPUs, the Python of the newest vLLM laid over it, and that
of the newest SGLang, with stand-ins for packages that need a GPU (``environment.py``, ``stubs.py``). In a
child process for each row (``child.py``; ``on_vllm.py``, ``on_sglang.py``) the engine's own code reads the
config, builds the model, and loads the weights into parameters that were filled with a byte before, twice:
what differs between the two, no tensor wrote. ``stored.py`` decodes the file and compares. Nothing of the
engines is replaced but what needs a GPU: kernels, their choice (asked for each GPU afterwards), and repacking
for them.

``rows.py`` is what is checked, ``results.py`` what comes out: ``results.json`` beside this file.
"""
