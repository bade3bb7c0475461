"""The console, the only room that prints.

It is installed as a package of its own, `care_hf_console`: its help must not wait for torch, which `import care_hf`
loads. So nothing here imports `care_hf` before a command runs.
"""
