"""What run.sh calls: each verb is a module with a main. They know all rooms of the project, and no room knows them.

No verb imports torch, transformers or DeepSpeed before it has said so: the imports that bring them stand in functions.
"""
