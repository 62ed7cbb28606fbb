/*
 * apply_hello.cpp
 *		What a peer is told before it sends anything: who we are, and how far its
 *		stream is here.
 */
#include "apply_internal.hpp"

namespace mmrepl::apply
{

/* The older of both protocols is spoken.  A standby refuses here rather than at the first batch. */
Datum
SqlHello(FunctionCallInfo fcinfo)
{
	pg_uuid_t *node = PG_GETARG_UUID_P(0);
	int32 stream = PG_GETARG_INT32(1);
	int32 protocol = PG_GETARG_INT32(2);
	TupleDesc desc;
	bool nulls[4] = {};

	shmem::RequireReady();
	PreventCommandIfReadOnly("mmrepl.hello()");
	shmem::NotePeerSession();
	if (protocol < 1)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("invalid protocol version: %d", protocol)));
	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE || desc->natts != 4)
		ereport(ERROR, (errcode(ERRCODE_DATATYPE_MISMATCH),
						errmsg("mmrepl.hello() is not declared as this library expects"),
						errhint("ALTER EXTENSION mmrepl_bgw UPDATE;")));
	pg_uuid_t own = catalog::NodeId();
	Datum values[4] = {Int32GetDatum(Min(protocol, batch::kProtocol)), UUIDPGetDatum(&own),
					   Int64GetDatum((int64) Watermark(*node, stream)),
					   Int32GetDatum(PG_VERSION_NUM)};

	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), values, nulls)));
}

} // namespace mmrepl::apply
