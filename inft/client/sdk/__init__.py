"""The training client as a program uses it: ServiceClient, TrainingClient, Future, in process or over HTTP.

`service` and `training` are what users call; `futures` and `results` are what they get back; `values` makes plain JSON
values of batches; `transport` says what is asked of an engine, `local` asks one in this process, `http` one elsewhere.
None of it imports torch: that comes with the engine in process.
"""
