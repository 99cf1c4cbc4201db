"""Configs of tiny guards: an encoder-decoder, and a classifier of three labels."""

from transformers import BertConfig, T5Config


T5 = T5Config(
    vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0,
    architectures=["T5ForConditionalGeneration"],
)  # fmt: skip
BERT = BertConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=3,
    max_position_embeddings=64, architectures=["BertForSequenceClassification"],
)  # fmt: skip
