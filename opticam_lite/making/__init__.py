"""Makes ``data/``: rendered scenes with known objects, and networks trained on such scenes.

Nothing here is needed to explain an image. Two commands reproduce the data:

- ``python -m opticam_lite.making.scenes data/scenes`` the evaluation split;
- ``python -m opticam_lite.making.training scenes_resnet`` a network.

A scene shows one to three toy-like objects of one class, with neutral clutter, in an environment.
The classes differ in **shape** alone: colours, materials, light and viewpoint are independent of
the class. Only the environment may be correlated with the class: each class has a *home*, and the
share of scenes at home (``home_rate``) is the strength of this correlation.

There are two steps, so that all randomness is in the first:

>>> from opticam_lite.making.rendering import render
>>> from opticam_lite.making.sampling import sample
>>> spec = sample(seed=1, index=0)          # what is in the scene: plain numbers
>>> scene = render(spec)                    # the picture, with label, boxes and masks
>>> scene.image.shape, scene.image.dtype
((224, 224, 3), dtype('uint8'))
>>> swapped = render(spec, environment="snow")   # the same objects and clutter, somewhere else
>>> empty = render(spec, objects=False)          # the same place without the class's objects

The same seed and index give the same specification on every machine; pixels may differ in the last
bit between processors. Objects are signed distance functions, sphere-traced by NumPy at twice the
picture's size inside each object's bounding box on the picture; the ground and the wall behind it
are textured planes. Units: the ground is y = 0, y points up, objects are about one unit tall;
angles are in radians, colours are RGB in [0, 1].
"""
