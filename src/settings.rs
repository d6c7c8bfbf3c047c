//! The common form of settings: a struct with public fields, `new` for the required ones, and
//! `with_<field>` for the rest.

/// Generates methods that set one field each.
///
/// `with_seed(seed: u64);` takes the field's type.
/// `with_log(log: impl Into<PathBuf>) = Some(log.into());` takes another type and gives the
/// expression for the field's value.
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
