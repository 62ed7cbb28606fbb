/*
 * change_wire.cpp
 *		How types travel, and the bytes of values that have no fixed width.
 */
#include "change_internal.hpp"

namespace mmrepl::change
{

Wire
WireOf(Oid base_type)
{
	switch (base_type)
	{
		case BOOLOID:
			return Wire::Bool;
		case INT2OID:
			return Wire::Int16;
		case INT4OID:
		case DATEOID:
			return Wire::Int32;
		case INT8OID:
		case TIMEOID:
		case TIMESTAMPOID:
		case TIMESTAMPTZOID:
		case MONEYOID:
			return Wire::Int64;
		case OIDOID:
		case FLOAT4OID:
			return Wire::Bits32;
		case FLOAT8OID:
			return Wire::Bits64;
		case TEXTOID:
		case VARCHAROID:
		case BPCHAROID:
		case BYTEAOID:
			return Wire::Varlena;
		case UUIDOID:
			return Wire::Uuid;
		case NUMERICOID:
		case INTERVALOID:
		case TIMETZOID:
		case INETOID:
		case CIDROID:
		case MACADDROID:
		case MACADDR8OID:
		case BITOID:
		case VARBITOID:
		case POINTOID:
		case BOXOID:
			return Wire::Function;
		default:
			return Wire::Text;
	}
}

/* Calls the type's function; detoasts. */
Value
BytesOf(Wire wire, FmgrInfo *output, Datum value)
{
	if (wire == Wire::Text)
	{
		char *text = OutputFunctionCall(output, value);

		return {text, (uint32) strlen(text)};
	}
	struct varlena *bytes =
		wire == Wire::Varlena ? PG_DETOAST_DATUM_PACKED(value) : SendFunctionCall(output, value);

	return {VARDATA_ANY(bytes), (uint32) VARSIZE_ANY_EXHDR(bytes)};
}

bool
IsFixed(Wire wire)
{
	return wire != Wire::Varlena && wire != Wire::Function && wire != Wire::Text;
}

/* A value of another type goes over its text. */
Value
WireBytes(const Column *column, Oid local_type, Datum value)
{
	Wire wire = column->binary ? WireOf(column->type) : Wire::Text;
	Oid function, ioparam;
	FmgrInfo output;
	bool is_varlena;

	if (column->binary && getBaseType(local_type) != column->type)
	{
		getTypeOutputInfo(local_type, &function, &is_varlena);
		char *text = OidOutputFunctionCall(function, value);

		getTypeInputInfo(column->type, &function, &ioparam);
		value = OidInputFunctionCall(function, text, ioparam, -1);
	}
	if (column->binary)
		getTypeBinaryOutputInfo(column->type, &function, &is_varlena);
	else
		getTypeOutputInfo(local_type, &function, &is_varlena);
	fmgr_info(function, &output);
	MmreplEnsure(!IsFixed(wire), "type %u has no bytes of its own", column->type);
	return BytesOf(wire, &output, value);
}

/* Raises only when there is no memory. */
void
Digest(const char *bytes, uint64 length, char *digest)
{
	uint8 result[PG_SHA256_DIGEST_LENGTH];
	pg_cryptohash_ctx *context = pg_cryptohash_create(PG_SHA256);

	bool done = pg_cryptohash_init(context) >= 0 &&
				pg_cryptohash_update(context, (const uint8 *) bytes, length) >= 0 &&
				pg_cryptohash_final(context, result, sizeof(result)) >= 0;

	pg_cryptohash_free(context);
	MmreplEnsure(done, "could not compute a SHA-256 digest");
	memcpy(digest, result, kDigestBytes);
}

} // namespace mmrepl::change
