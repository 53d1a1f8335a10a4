"""`wanfast bench`: one case on wanfast and on the reference, in turn, with what the speed costs the video.

case.py               what is run, settled before anything is loaded
random_model.py       a model of random weights, where there is no checkpoint
engine.py             what an engine is to the benchmark; wanfast itself
diffusers_engine.py   diffusers over the same tensors; diffusers_pipeline.py builds it
official_engine.py    a checkout of the official code
worker.py             an engine in a process of its own
measure.py            seconds, memory, power and peak rates
rounds.py             who runs when
difference.py         two videos: PSNR, SSIM, worst pixel
report.py             all of it as JSON (report.schema.json); markdown.py as a page; compare.py against an earlier one
command.py            the command

diffusers is imported in the reference's process alone, inside functions.
"""
