"""Fields of a ``config.json`` that make no difference to what any family computes, and why."""

from __future__ import annotations

_FIELDS = {
    "Of training": """
        activation_dropout attention_dropout attention_probs_dropout_prob attn_pdrop classifier_dropout
        decoder_layerdrop dropout dropout_rate emb_pdrop embd_pdrop embed_dropout embedding_dropout encoder_layerdrop
        gradient_checkpointing hidden_dropout hidden_dropout_prob init_device init_std initializer_cutoff_factor
        initializer_factor initializer_range layerdrop mlp_dropout output_router_logits qa_dropout resid_dropout
        resid_pdrop residual_dropout router_aux_loss_coef router_jitter_noise seq_classif_dropout
        sparse_pred_ignore_index sparse_prediction""",
    "Of what is built upon a model, and not served": """
        classifier_activation classifier_bias classifier_pooling decoder_bias finetuning_task id2label label2id
        num_labels problem_type summary_activation summary_first_dropout summary_proj_to_labels summary_type
        summary_use_proj task_specific_params""",
    "Of what a caller gets, or how it is computed": """
        attention_softmax_in_fp32 chunk_size_feed_forward deterministic_flash_attn output_attentions
        output_hidden_states reorder_and_upcast_attn return_dict scale_attention_softmax_in_fp32 slow_but_exact
        use_cache""",
    "Read where texts and tokens are dealt with, from the tokenizer or the generation's configuration": """
        bad_words_ids bos_token_id cls_token_id decoder_start_token_id eos_token_id forced_bos_token_id
        forced_eos_token_id pad_token_id prefix sep_token_id""",
    "Read where weights are loaded": "dtype torch_dtype",
    "Of who wrote the file": "_name_or_path architectures auto_map transformers_version",
    "Follows from the model_type": "is_decoder is_encoder_decoder",
}

IRRELEVANT = {field: reason for reason, fields in _FIELDS.items() for field in fields.split()}
