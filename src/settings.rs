//! The one form of settings: a struct with public fields, `new` for what is required, and `with_<field>` for the rest.

/// The methods that set one field each: `with_seed(seed: u64);` takes the field's type, and
/// `with_log(log: impl Into<PathBuf>) = Some(log.into());` takes another and says what the field becomes.
macro_rules! setters {
    ($($method:ident($field:ident: $type:ty) $(= $value:expr)?;)*) => {$(
        #[doc = concat!("Sets [`", stringify!($field), "`](Self::", stringify!($field), ").")]
        pub fn $method(mut self, $field: $type) -> Self {
            self.$field = setters!(@value $field $($value)?);
            self
        }
    )*};
    (@value $field:ident) => { $field };
    (@value $field:ident $value:expr) => { $value };
}
