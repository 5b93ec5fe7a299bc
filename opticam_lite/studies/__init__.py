"""Studies: measurements that compare several masks or networks, as tidy frames.

`boxes` masks images by boxes, by maps and by both (Table 5 of the paper). `truth` compares maps
with what a network relies on, which can be measured on scenes with counterfactual twins. `sanity`
asks whether maps change when the network's weights become random (Figs. A6, A7).
"""
