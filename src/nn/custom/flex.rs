impl super::DecoderOps for burn::backend::Flex {}
