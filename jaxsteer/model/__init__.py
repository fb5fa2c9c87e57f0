"""A chat model whose residual stream can be read and changed.

A Hugging Face folder, a hub id or a GGUF file comes in; a `ChatModel` goes out, with parameters,
tokenizer, configuration and the hashes of all of them. `find` and `ChatModel.load` give a model;
`convert`, `gguf`, `config` and `weights` read the source, and `checkpoint` stores the result.
`decoder` and `layers` are the computation, `interventions` the operations on the stream, as arrays.
Begin with `interventions`, then read `decoder`: these two explain steering without the others.
"""
