"""The ops in Triton, for GPUs: the chunk ops in stages, decoding, and what surrounds the recurrence.

The way of a chunk op's data (C chunks, everything but the loops for all of them at once):

    forward     content_terms                   CARVE with diagonal erase: the erase gates, chunk after chunk
                decay                           decays as factors, of that form with the erase in them
                steep, chunk_operands           scores, inverse, what a chunk does to any state
                chunk_state                     the state, chunk after chunk
                chunk_output                    outputs
    backward    decay, gradient_operands        what of the forward is needed again
                chunk_state                     the state's gradient, from the last chunk to the first
                content_operands                CARVE with diagonal erase, in the place of chunk_state: first what waits
                content_gradient                for no later chunk, for all at once, then with the gates' gradients
                chunk_gradient, steep           gradients of everything that belongs to tokens
                erasing_gradient                of that form those on the key axis, in the place of chunk_gradient's

Where that leaves a GPU less idle, chunk_state, both ways, goes through segments of a sequence at once (see segments),
and content_operands runs beside content_gradient.

CARVE with delta erase has delta_operands and delta_state in the places of chunk_operands and chunk_state. A stage is a
file: its kernels, their launch, their tuning. chunk_ops puts the stages together; stages has what they share, launching
how they are started. decode has the recurrent ops; decode_mixer and decode_products, whose launches overlap, all of a
layer's step of one token. paged_attention is for the attention layers of models with the mixers, where they serve many
requests.
"""
