//! The wire format of protocol buffers, as far as SentencePiece's files use it.

/// A field's value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value<'a> {
    Varint(u64),
    Fixed32([u8; 4]),
    Fixed64([u8; 8]),
    Bytes(&'a [u8]),
}

impl<'a> Value<'a> {
    pub fn bytes(self) -> Option<&'a [u8]> {
        match self {
            Value::Bytes(bytes) => Some(bytes),
            _ => None,
        }
    }

    pub fn text(self) -> Option<&'a str> {
        std::str::from_utf8(self.bytes()?).ok()
    }

    pub fn f32(self) -> Option<f32> {
        match self {
            Value::Fixed32(bytes) => Some(f32::from_le_bytes(bytes)),
            _ => None,
        }
    }

    pub fn bool(self) -> Option<bool> {
        match self {
            Value::Varint(value) => Some(value != 0),
            _ => None,
        }
    }

    /// A number of type `int32` or of an enumeration. Negative ones are stored as 64 bits.
    pub fn i32(self) -> Option<i32> {
        match self {
            Value::Varint(value) => i32::try_from(value.cast_signed()).ok(),
            _ => None,
        }
    }
}

/// The fields of a message in the order of the file: number and value. After an error, which is the
/// offset of the field, there are no more.
pub(super) struct Message<'a> {
    rest: &'a [u8],
    len: usize,
}

impl<'a> Message<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self {
            rest: bytes,
            len: bytes.len(),
        }
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.rest.split_first_chunk::<N>()?;
        self.rest = rest;
        Some(*head)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let [byte] = self.take()?;
            let part = u64::from(byte & 0x7F);
            // The tenth byte has room for a single bit.
            if shift == 63 && part > 1 {
                return None;
            }
            value |= part << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn field(&mut self) -> Option<(u32, Value<'a>)> {
        let key = self.varint()?;
        let number = u32::try_from(key >> 3).ok().filter(|number| *number > 0)?;
        let value = match key & 7 {
            0 => Value::Varint(self.varint()?),
            1 => Value::Fixed64(self.take()?),
            2 => {
                let len = usize::try_from(self.varint()?).ok()?;
                let (bytes, rest) = self.rest.split_at_checked(len)?;
                self.rest = rest;
                Value::Bytes(bytes)
            }
            5 => Value::Fixed32(self.take()?),
            // Groups, which no current file has, and types that do not exist.
            _ => return None,
        };
        Some((number, value))
    }
}

impl<'a> Iterator for Message<'a> {
    type Item = Result<(u32, Value<'a>), usize>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let at = self.len - self.rest.len();
        let field = self.field();
        if field.is_none() {
            self.rest = &[];
        }
        Some(field.ok_or(at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(bytes: &[u8]) -> Result<Vec<(u32, Value<'_>)>, usize> {
        Message::new(bytes).collect()
    }

    #[test]
    fn every_kind_of_value_is_read() {
        let bytes = [
            0x08, 0x96, 0x01, // 1: 150
            0x12, 0x02, b'h', b'i', // 2: "hi"
            0x1D, 0, 0, 0x80, 0x3F, // 3: 1.0
            0x21, 1, 2, 3, 4, 5, 6, 7, 8, // 4: eight bytes
            0x80, 0x01, 0x00, // 16: 0
        ];
        let found = fields(&bytes).unwrap();
        assert_eq!(found[0], (1, Value::Varint(150)));
        assert_eq!(found[1].1.text(), Some("hi"));
        assert_eq!(found[2].1.f32(), Some(1.0));
        assert_eq!(found[3], (4, Value::Fixed64([1, 2, 3, 4, 5, 6, 7, 8])));
        assert_eq!(found[4], (16, Value::Varint(0)));
        let minus = [0x08, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1];
        assert_eq!(fields(&minus).unwrap()[0].1.i32(), Some(-1));
    }

    #[test]
    fn broken_messages_give_the_offset() {
        let ok = [0x08, 0x01];
        for bad in [
            &[0x08][..],                                                  // no value
            &[0x12, 0x05, b'h'],                                          // too short
            &[0x12, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1],      // longer than all memory
            &[0x08, 255, 255, 255, 255, 255, 255, 255, 255, 255, 2],      // over 64 bits
            &[0x08, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 1], // over ten bytes
            &[0x0B],                                                      // a group
            &[0x0F, 0x00],                                                // type 7
            &[0x00, 0x00],                                                // field 0
            &[0x1D, 0, 0],
        ] {
            assert_eq!(fields(bad), Err(0), "{bad:?}");
            assert_eq!(fields(&[&ok, bad].concat()), Err(2), "{bad:?}");
        }
    }
}
