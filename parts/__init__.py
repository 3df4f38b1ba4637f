"""What the scripts share, and what the documented example does not have; one subject a file.

Scripts import parts, parts never import scripts. What the readers of the data set script start
with (all but near_copies) imports neither MLX nor NumPy; a module that imports MLX imports device
before it.

python_version    one line where Python is too old; Ctrl-C while a script imports
device            which device computes, and its BLAS, streams and memory
ops               the one door: each operation's CPU form, CUDA kernel, or MLX's own
ops_cpu           what a CPU needs, with its gradients
ops_cuda          the training kernels of ops_cuda.cu
quantized_cuda    weights of 4 bits in 16, and times a few vectors: quantized_cuda.cu
recompute         cheap parts of the network computed again rather than kept
training_layers   which layers train a model: one of the three that follow
separate_layers   the model's own
numpy_training    a CPU's, in NumPy: loss and gradients, a thread for each share of a batch
numpy_layers      the layers for it, forward and backward
sgemm             products of NumPy's matrices by the fast BLAS
joined_layers     the layers of a model in training, with fewer and larger operations
joined_linear     linear layers with one input as one product in training, and their LoRA pair
linear_cross_entropy  the loss, without ever holding all logits
nvrtc             compile CUDA kernels, and ask what the GPU has; numbers.cuh is their 16-bit types,
                  tensor_cores.cuh their products by tensor cores
config_values     whether values read from a file are what a dataclass says
rope              rotary positions: frequencies, scaled or not, and tables of cosines and sines
kv_cache          the keys and values of a layer's positions so far
merged_linear     linear layers with one input as one product
decoder           generate text: prefill, one token at a time
sampling          the next token: temperature, top k, top p, min p, the penalty on repetition
stop_text         a stream of text that ends before some
answers           the text that follows a prompt, as the flags want it
conversation      what a user and a model say, turn by turn, with one cache
talk              a conversation on a terminal, from a pipe, or of one message
decoder_batch     many texts at once, token by token
decoder_batch_cpu  their steps in NumPy, with weights in blocks
decoder_batch_cuda  their attention in one kernel: decoder_batch_cuda.cu
continuous_batching  rows of a batch, which other texts take over when theirs end
batch_generation  answers to a file of prompts, as JSON
prompt_file       a file of prompts: JSON objects, or lines of text
decoder_cuda      a layer for one token in one kernel: decoder_cuda.cu, decoder_products.cuh
files             atomic writes; what a file holds, whatever its name says; JSON; text
cli               one parser, errors on one line, exit statuses, signals, "did you mean"
source_checkpoints   Meta's, Mistral's and Hugging Face's layouts of files
module_names      what Meta, Hugging Face and GGUF call the same modules: maps for both ways
hugging_face      its names, config and order of rows turned into Meta's
params_json       Meta's and Mistral's params.json
unsupported       refuses what cannot be run, by the name that its users know
export_hugging_face  the way out: its folder, with safetensors and config.json
export_gguf       the way out to llama.cpp: one GGUF file
gguf_vocabulary   a tokenizer as GGUF has it
tokenizer_export  a tokenizer's files for transformers; tokenizer.json of a SentencePiece model
fusing            weights with an adapter merged in, some rows at a time
staging           a folder written whole or not at all
lazy_tensors      tensors that stay in their files, a few rows in memory at a time; shards joined
float16           the values of a checkpoint as float16
pipeline          read ahead and write behind, side by side with what computes
torch_files       the files of torch, read without it
model_folder      weights.npz, params.json, tokenizer and chat template: read, write
tokenizers        SentencePiece's and Hugging Face's files, special tokens; text as a stream
added_tokens      tokens that are found in a text before all others
source_tokenizers  the tokenizer of a checkpoint, in whichever format
byte_level_bpe    Llama 3's and Tekken's files to Hugging Face's
records           a JSONL file of texts, prompts and completions, or chats
chat              chats to text by templates, and what of it the assistant answers
chat_renderer     templates rendered in a process of its own, which the system may end
token_rows        records to rows of token ids, and which of them count in the loss
token_cache       the token ids of a large data file, kept next to it
batches           rows of token ids to arrays of few lengths
packing           short texts that share a row

flags             lora.py's command line: numbers, and what cannot be given together
training          what a training does around its steps
steps             when the pieces of a training step run: batches summed, ranks, compiling
schedules         how many updates, the learning rate of each, the optimizer
best              the best validation of a run, and how long ago that was
adapters          the adapter file: read, check, write
adapter_formats   the adapters of PEFT and mlx-lm: read their folders
adapter_export    write such a folder
dropout           masks of LoRA's inputs, the same at each run
save_and_resume   crash-safe save and resume
fingerprint       what decides a run's result, which resuming checks
run_log           steps and seconds, lines and summaries, the log file, the plot
run_files         the files that a training writes, and whether those in their places are one's
interrupts        what Ctrl-C does to a training
ranks             several processes that train together, and their watchdog

package_reader    a package's docstrings, read in processes of their own
foreign           looking at the objects of other packages, which may run any code or never return
package_modules   the modules of a package, imported, and what was installed with it
docstrings        a docstring made fit to learn from: sections, truncation, noise
markup            what a reader sees of a docstring's markup
inline_markup     roles, links, emphasis, escapes: the marks inside a paragraph
public_objects    every public object of a package, under the name that a user types
near_copies       which texts are too alike to be trained on and tested
"""
